"""What one node does to a metric through another one."""
