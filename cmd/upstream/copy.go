package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// copy gives an image more names, in its own registry or in others, and prints them.
// The digest stays the same. timeout limits each name. A name that failed can be given
// again: what a registry already has is not sent again.
func (i images) copy(ctx context.Context, timeout time.Duration, image string, names []string, stdout io.Writer) error {
	from, err := i.reference(image)
	if err != nil {
		return usageError{err}
	}
	var tags []name.Tag
	for _, to := range names {
		ref, err := i.reference(to)
		tag, ok := ref.(name.Tag)
		if err == nil && !ok {
			err = fmt.Errorf("copy: not a name with a tag (got %q); use IMAGE:TAG", to)
		}
		if err != nil {
			return usageError{err}
		}
		tags = append(tags, tag)
	}
	for n, tag := range tags {
		if err := write(ctx, timeout, from, tag); err != nil {
			return fmt.Errorf("copying %s to %s: %w", image, names[n], err)
		}
		if _, err := fmt.Fprintln(stdout, names[n]); err != nil {
			return err
		}
	}
	return nil
}

func write(ctx context.Context, timeout time.Duration, from name.Reference, to name.Tag) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	found, err := remote.Get(from, options(ctx)...)
	if err != nil {
		return registryError(err)
	}
	index, err := found.ImageIndex()
	if err != nil {
		return err
	}
	return remote.WriteIndex(to, index, options(ctx)...)
}
