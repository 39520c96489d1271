"""The main job: one command that explains and intervenes on real models, and writes a page about it."""
