"""What travels with Triscope beside its code: models, samples, descriptors of public data sets."""
