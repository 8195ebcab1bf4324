"""What erasing means: the artefact format, sites, carriers, gates, the trainer, and one place for each method."""
