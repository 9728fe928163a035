"""What if other features were ablated: accuracies while features are toggled, and which of them matter."""
