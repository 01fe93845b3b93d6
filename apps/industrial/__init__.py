"""The industrial app: learns a part from good images, judges each frame, keeps the line's statistics."""
