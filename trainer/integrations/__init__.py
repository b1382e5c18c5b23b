"""Where a job's metrics also go. A package of such a service is only imported by a process of its own."""
