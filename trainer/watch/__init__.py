"""What people watch of a run: its metrics file and line, cost, trackers, report, and when rollouts are spent."""
