"""What a person looks at: pictures, curves, tables, and the speed of training."""
