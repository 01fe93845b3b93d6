"""The medical app: DICOM or NIfTI in, structures segmented and measured, DICOM SEG out."""
