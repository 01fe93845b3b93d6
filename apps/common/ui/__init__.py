"""The look of the pages and the widgets that all apps share."""
