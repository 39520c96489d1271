"""How to reach inside a model: sites, targets, programs, contexts and the pull-back."""
