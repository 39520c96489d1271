"""Stand-in for shap."""


class DeepExplainer:
    """Never instantiated."""
