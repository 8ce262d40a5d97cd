"""Times jlstm beside other libraries: ``python -m jlstm bench``."""
