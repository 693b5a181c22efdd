package node

// Reload reads key files, limits and certificate files again, as their watches do after each
// change, and returns the files. A file that is invalid now changes nothing. Health
// has the result at once.
func (n *Node) Reload() []string {
	defer n.health.Changed()
	var files []string
	if gate := n.gate.Load(); gate != nil {
		files = gate.Reload()
	}
	if n.config.NodeLimits.File != "" {
		n.nodeLimits.Reload()
		files = append(files, n.config.NodeLimits.File)
	}
	if c, ok := n.certs.(interface{ Reload() []string }); ok {
		files = append(files, c.Reload()...)
	}
	return files
}
