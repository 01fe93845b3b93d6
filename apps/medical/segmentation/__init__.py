"""Where the structures are in a volume, and which voxels belong to them."""
