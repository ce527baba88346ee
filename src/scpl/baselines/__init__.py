"""End-to-end training over several ranks, on the same stream of batches and marks."""
