"""Where frames come from: a folder, a video or camera, an upload, a generator of parts."""
