"""Questions beyond the paper, a file for each kind."""
