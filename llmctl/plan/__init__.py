"""Plan the memory and time of a stage on hardware that is not attached, by compiling or modelling its programs."""
