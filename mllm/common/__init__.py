"""What every part of the library uses: errors, console, folders, processes, ranks, numbers' precision, provenance."""
