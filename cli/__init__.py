"""The command line of twa-merge: reads options, calls the library, draws what it returns."""
