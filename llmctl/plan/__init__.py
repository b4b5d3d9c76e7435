"""Plan of a stage's memory and time on hardware that is not attached: its programs are compiled or modelled."""
