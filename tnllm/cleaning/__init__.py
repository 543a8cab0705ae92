"""From raw web text to documents worth training on: repair, filters, de-duplication, decontamination, self-cleaning."""
