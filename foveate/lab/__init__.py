"""The laboratory: methods on test sets, compared under equal conditions; the tables of the papers; studies."""
