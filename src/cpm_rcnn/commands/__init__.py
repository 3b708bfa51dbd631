"""What the commands do once their config is composed and checked; imported only then, since it imports torch."""
