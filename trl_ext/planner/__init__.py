"""Will it fit: memory and time of a method on a layout, by phases, before anything is loaded."""
