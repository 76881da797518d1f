"""Programs that measure; each ends with one JSON line. Nothing here is imported by the server."""
