// Package filekind reads files as people bring them. An error names what a file
// contains in place of what derpd reads, and the command that converts the file.
//
// [Read] and [Text] serve every file of text. regular.go reads, pem.go splits a file into PEM
// blocks, and binary.go recognises binary forms by their first bytes.
package filekind

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"syscall"
)

// Read returns the content of a regular file of at most [MaxSize] bytes. It refuses
// text in UTF-16. The error wraps that of [Regular].
func Read(path string) ([]byte, error) {
	data, err := Regular(path, MaxSize)
	if errors.Is(err, syscall.EISDIR) {
		return nil, fmt.Errorf("%w; Docker makes a directory when the host has no such file: remove the directory, and put the file there", err)
	}
	if err != nil {
		return nil, err
	}
	if encoding := utf16(data); encoding != "" {
		return nil, fmt.Errorf("%s is in UTF-16; run `%s`", path, Replace("iconv -f "+encoding+" -t UTF-8 "+Quote(path)+" >", path))
	}
	return data, nil
}

// utf16 returns the name under which iconv knows the encoding of data; empty for
// every other encoding. Windows PowerShell 5 writes UTF-16 by default.
func utf16(data []byte) string {
	switch {
	case bytes.HasPrefix(data, []byte("\xff\xfe")), bytes.HasPrefix(data, []byte("\xfe\xff")):
		return "UTF-16"
	case len(data) < 4:
		return ""
	case printable(data[0]) && data[1] == 0 && printable(data[2]) && data[3] == 0:
		return "UTF-16LE"
	case data[0] == 0 && printable(data[1]) && data[2] == 0 && printable(data[3]):
		return "UTF-16BE"
	}
	return ""
}

func printable(b byte) bool { return b >= ' ' && b <= '~' }

var byteOrderMark = []byte("\xef\xbb\xbf")

// Text refuses content that is empty, binary, HTML, or has a byte order mark.
func Text(path string, data []byte) error {
	if len(bytes.TrimSpace(data)) == 0 {
		return fmt.Errorf("%s is empty; write the file again", path)
	}
	if bytes.Contains(data, byteOrderMark) {
		return fmt.Errorf("%s has a byte order mark; run `LC_ALL=C sed -i 's/\\xef\\xbb\\xbf//g' %s`", path, Quote(path))
	}
	if err := binary(path, data); err != nil {
		return err
	}
	start := strings.ToLower(string(bytes.TrimSpace(data[:min(len(data), 512)])))
	if strings.HasPrefix(start, "<!doctype html") || strings.Contains(start, "<html") {
		return fmt.Errorf("%s is an HTML page, perhaps of a login; download the file itself", path)
	}
	return nil
}

// bare is a path that a shell takes as it is.
var bare = regexp.MustCompile(`^[a-zA-Z0-9_@%+=:,./-]+$`)

// Quote returns a path for a POSIX shell.
func Quote(path string) string {
	if bare.MatchString(path) {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

// Replace returns a shell command that replaces a file. The given command reads the
// file, and ends before the name of its output: with > or -out. The output is
// another file at first, because openssl empties its output before it reads. The
// copy keeps owner and mode.
func Replace(command, path string) string {
	next := Quote(path + ".new")
	return command + " " + next + " && cp " + next + " " + Quote(path) + " && rm " + next
}
