"""What is learned: one LightningModule a file."""
