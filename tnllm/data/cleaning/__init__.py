"""From raw web text to documents worth learning from: repair, filters, de-duplication, decontamination; no torch."""
