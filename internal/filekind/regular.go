package filekind

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// MaxSize is the largest file that [Read] reads, in bytes. Keys, secrets and
// certificates have a few kilobytes.
const MaxSize = 1 << 20

// Regular returns the content of a regular file of at most limit bytes. It never
// waits: it opens no pipe and no device. The error wraps a [fs.PathError].
func Regular(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		e.Op = "open" // as readers of a file expect
	}
	if err != nil {
		return nil, err
	}
	if err := isRegular(path, info); err != nil {
		return nil, err
	}
	// The file may have been replaced since. Without O_NONBLOCK, opening a pipe
	// waits for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := isRegular(path, info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("has more than %d bytes; correct the path", limit)}
	}
	return data, nil
}

func isRegular(path string, info fs.FileInfo) error {
	var err error
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		err = syscall.EISDIR
	case mode&fs.ModeNamedPipe != 0:
		err = errors.New("is a pipe, not a file; put the content into a file")
	case mode&fs.ModeSocket != 0:
		err = errors.New("is a socket, not a file; correct the path")
	default:
		err = errors.New("is a device, not a file; correct the path")
	}
	return &fs.PathError{Op: "read", Path: path, Err: err}
}
