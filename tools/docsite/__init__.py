"""The documentation site: the pages of docs/, and pages made from the code, as one folder for Zensical to build."""
