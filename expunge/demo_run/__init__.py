"""The main job on the bundled model, end to end: train an SPM, erase with it, draw before and after, score, show."""
