"""What a run will hold in memory, on the device and on the host, told before anything is loaded."""
