"""The operator's command line: against the controller's and the agents' APIs, never into maps."""
