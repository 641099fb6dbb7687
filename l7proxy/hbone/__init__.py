"""HTTP/2 CONNECT streams between nodes, sans-IO."""
