"""Volumes before a network sees them: orientation, resampling, normalisation, cropping."""
