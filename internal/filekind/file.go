package filekind

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// maxSize limits a file, in bytes. A list of 50,000 node keys is shorter.
const maxSize = 4 << 20

// ReadFile is [os.ReadFile] for a path that a person has set. It does not wait for
// the other end of a named pipe. It refuses pipes and devices, which cannot be read
// again, and files of more than 4 MiB.
func ReadFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular() && !info.IsDir(): // the read of a directory fails
		return nil, fmt.Errorf("%s is a pipe or a device; put a file there", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if len(data) > maxSize {
		return nil, fmt.Errorf("%s has more than %d MiB; put the right file there", path, maxSize>>20)
	}
	return data, err
}
