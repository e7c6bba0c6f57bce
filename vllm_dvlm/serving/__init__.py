"""What stands between a client and the engine: checks, errors, streams, headers, metrics, the page."""
