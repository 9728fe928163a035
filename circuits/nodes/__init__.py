"""What single nodes do to a metric."""
