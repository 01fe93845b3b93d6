"""The applications of Triscope: one package an app, and what they share in `apps.common`."""
