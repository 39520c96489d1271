"""TensorDict-native hooks for interpretability: explain, intervene, experiment."""
