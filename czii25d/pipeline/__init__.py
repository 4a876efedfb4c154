"""One function per script; the only part of the package that sees a configuration."""
