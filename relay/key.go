package relay

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"tailscale.com/atomicfile"
	"tailscale.com/types/key"

	"derpd/internal/filekind"
)

// keyFile has the format of derper's configuration file, so that an operator
// can copy the file to keep the key of a derper.
type keyFile struct {
	PrivateKey key.NodePrivate
}

// LoadKey reads the node key from path. The error wraps [fs.ErrNotExist] if
// there is no file. After any other error the file may contain a key, and must
// not be replaced.
func LoadKey(path string) (key.NodePrivate, error) {
	data, err := filekind.Regular(path, filekind.MaxSize)
	if err != nil {
		return key.NodePrivate{}, fmt.Errorf("reading node key: %w", err)
	}
	var f keyFile
	if err := json.Unmarshal(data, &f); err != nil || f.PrivateKey.IsZero() {
		// The cause is left out, because it may quote the key.
		return key.NodePrivate{}, fmt.Errorf("reading node key: %s holds no node key; restore it from a backup, or remove it to get a new key (clients accept a new key)", path)
	}
	return f.PrivateKey, nil
}

// LoadOrCreateKey reads the node key from path. If there is no file it creates
// one with a new key and mode 0600. It never replaces a file.
func LoadOrCreateKey(path string) (key.NodePrivate, error) {
	private, err := LoadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return private, err
	}
	private = key.NewNode()
	data, err := json.Marshal(keyFile{PrivateKey: private})
	if err != nil {
		return key.NodePrivate{}, fmt.Errorf("encoding node key: %w", err)
	}
	if err := atomicfile.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return key.NodePrivate{}, fmt.Errorf("writing node key: %w", err)
	}
	return private, nil
}
