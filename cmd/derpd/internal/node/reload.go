package node

// Reload reads key files and certificate files again, as their watches do after each
// change, and returns the files. A file that is invalid now changes nothing.
func (n *Node) Reload() []string {
	var files []string
	if gate := n.gate.Load(); gate != nil {
		files = gate.Reload()
	}
	if c, ok := n.certs.(interface{ Reload() []string }); ok {
		files = append(files, c.Reload()...)
	}
	return files
}
