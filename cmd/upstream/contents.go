package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Limits of one platform, in bytes. derpd 1.104.7 has 7.0 MB, and 17.8 MB unpacked. With
// the linker's debugging data it has 24.7 MB; Debian's smallest base adds 75 MB. A
// release that has grown up to the limits is a reason to look why.
const (
	maxCompressed = 9_000_000
	maxUnpacked   = 22_000_000
)

const (
	binary  = "derpd"
	dataDir = "data"
	caFile  = "etc/ssl/certs/ca-certificates.crt"
	nonroot = 65532
)

// file is a file of an image. Only programs have their content.
type file struct {
	mode     int64
	uid, gid int
	size     int64
	link     bool
	program  []byte
}

// contents checks the size and the files of an image.
func (v *verifier) contents(ctx context.Context, platform string, img v1.Image, manifest *v1.Manifest, config *v1.ConfigFile, release string) error {
	compressed, err := download(manifest)
	if err != nil {
		v.say(platform, "size", err, "")
		return nil
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	if len(layers) != len(config.RootFS.DiffIDs) {
		return fmt.Errorf("%d layers, but the configuration names %d", len(layers), len(config.RootFS.DiffIDs))
	}
	files := make(map[string]file)
	var unpacked int64
	for i, layer := range layers {
		size, err := readLayer(layer, config.RootFS.DiffIDs[i], maxUnpacked-unpacked, files)
		unpacked += size
		if errors.Is(err, errTooLarge) {
			v.say(platform, "size", fmt.Errorf("more than %.1f MB unpacked", megabytes(maxUnpacked)), "")
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", manifest.Layers[i].Digest, err)
		}
	}
	v.say(platform, "size", nil, "%.1f MB compressed, %.1f MB unpacked", megabytes(compressed), megabytes(unpacked))
	v.say(platform, "programs", onlyProgram(files), "only /%s", binary)
	v.say(platform, "files", ownFiles(files), "/%s of %d:%d, /%s", dataDir, nonroot, nonroot, caFile)
	if program := files[binary].program; program != nil {
		v.binary(ctx, platform, program, release)
	}
	return nil
}

// download returns the size of all layers, before any of them is read. A negative size
// would be read without a limit.
func download(manifest *v1.Manifest) (compressed int64, err error) {
	for _, layer := range manifest.Layers {
		if layer.Size < 0 || layer.Size > maxCompressed {
			return 0, fmt.Errorf("layer %s has %d bytes; want at most %.1f MB", layer.Digest, layer.Size, megabytes(maxCompressed))
		}
		compressed += layer.Size
	}
	if compressed > maxCompressed {
		return 0, fmt.Errorf("%.1f MB compressed; want at most %.1f MB", megabytes(compressed), megabytes(maxCompressed))
	}
	return compressed, nil
}

func megabytes(n int64) float64 { return float64(n) / 1e6 }

// errTooLarge means that a layer has more bytes than the image may have.
var errTooLarge = errors.New("too large")

// readLayer adds the files of a layer, and returns their size. It unpacks nothing
// before the digest of the whole layer is verified.
func readLayer(layer v1.Layer, diffID v1.Hash, limit int64, files map[string]file) (int64, error) {
	blob, err := layer.Compressed()
	if err != nil {
		return 0, err
	}
	defer func() { _ = blob.Close() }()
	// The manifest limits the size. The reader compares size and digest at the end.
	packed, err := io.ReadAll(blob)
	if err != nil {
		return 0, err
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return 0, err
	}
	// Headers and padding of a tar take at most 2 kB a file here.
	const headers = 4 << 20
	hash := sha256.New()
	limited := &io.LimitedReader{R: io.TeeReader(unzipped, hash), N: limit + headers}
	size, err := readTar(tar.NewReader(limited), files)
	if err == nil {
		_, err = io.Copy(io.Discard, limited)
	}
	switch {
	case size > limit || limited.N == 0:
		return size, errTooLarge
	case err != nil:
		return size, err
	}
	if got := "sha256:" + hex.EncodeToString(hash.Sum(nil)); got != diffID.String() {
		return size, fmt.Errorf("unpacked digest is %s, but the configuration names %s", got, diffID)
	}
	return size, nil
}

// readTar adds the files of a layer, and returns their size.
func readTar(layer *tar.Reader, files map[string]file) (size int64, err error) {
	for {
		header, err := layer.Next()
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return size, err
		}
		size += header.Size
		name := strings.TrimPrefix(path.Clean("/"+header.Name), "/")
		// A layer removes files of the layers below by the prefix .wh.
		if removed, ok := strings.CutPrefix(path.Base(name), ".wh."); ok {
			gone := path.Join(path.Dir(name), removed)
			maps.DeleteFunc(files, func(other string, _ file) bool { return other == gone || strings.HasPrefix(other, gone+"/") })
			continue
		}
		f := file{mode: header.Mode, uid: header.Uid, gid: header.Gid, size: header.Size, link: header.Typeflag != tar.TypeReg}
		if !f.link {
			if f.program, err = readProgram(layer); err != nil {
				return size, err
			}
		}
		files[name] = f
	}
}

// readProgram returns the content of a file if it is a program, in ELF.
func readProgram(content io.Reader) ([]byte, error) {
	const magic = "\x7fELF"
	start := make([]byte, len(magic))
	n, err := io.ReadFull(content, start)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	if string(start[:n]) != magic {
		return nil, nil
	}
	return io.ReadAll(io.MultiReader(bytes.NewReader(start), content))
}

// onlyProgram returns an error unless the binary is the only program. Whoever gets
// into derpd finds no shell.
func onlyProgram(files map[string]file) error {
	var others []string
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if files[name].program != nil && name != binary {
			others = append(others, "/"+name)
		}
	}
	switch main := files[binary]; {
	case main.program == nil:
		return fmt.Errorf("/%s is not a program", binary)
	case main.mode&0o111 != 0o111:
		return fmt.Errorf("/%s has mode %o; want it executable for everybody", binary, main.mode)
	case len(others) > 0:
		return fmt.Errorf("%s; want only /%s", strings.Join(others, ", "), binary)
	}
	return nil
}

// ownFiles checks the files on which derpd depends: a volume takes its owner from the
// directory, and certificates of others are verified by the root certificates.
func ownFiles(files map[string]file) error {
	if dir, ok := files[dataDir]; !ok || dir.uid != nonroot || dir.gid != nonroot {
		return fmt.Errorf("/%s belongs to %d:%d; want %d:%d", dataDir, dir.uid, dir.gid, nonroot, nonroot)
	}
	if files[caFile].size == 0 {
		return fmt.Errorf("/%s is missing, so that no certificate can be obtained", caFile)
	}
	return nil
}
