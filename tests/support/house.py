"""What several tests know of the house."""

# What pipelines may import of pipelines.
SHARED = {
    *("recipes", "console", "progress", "cluster", "actors", "runners", "downloads", "devices", "shardtasks"),
    *("training_steps", "training_workers", "adaptation", "epochs"),
}
