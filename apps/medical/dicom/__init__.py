"""DICOM in and out: files to series, series to volumes, segmentations to SEG, and the network."""
