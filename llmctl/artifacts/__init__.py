"""Read and write artifacts, the folders that stages exchange. Each is saved atomically and identified by a digest."""
