"""What the apps share: settings, logs, database, blobs, audit, command-line habits and the look of the pages."""
