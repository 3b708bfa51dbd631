"""Overrides for a training run that takes seconds."""

SMALL = [
    "experiment=quickstart",
    "data.train_count=6",
    "data.val_count=5",
    "data.num_workers=0",
    "schedule.max_steps=4",
    "schedule.val_interval=2",
    "schedule.images_per_device=2",
    "detector.fpn_channels=16",
    "head_size.point_channels=4",
    "head_size.grid_convs=1",
    "head_size.mlp_channels=16",
    "head_size.samples=16",
    "detector.proposals_test=20",
    "trainer.log_every_n_steps=1",
    "sheet_images=3",
    "overwrite=true",
]
