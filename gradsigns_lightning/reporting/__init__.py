"""From the benchmark's records to tables and figures. Records are all that is read here."""
