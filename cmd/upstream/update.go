package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"

	"golang.org/x/mod/semver"

	"derpd/internal/release"
)

// updater finds newer versions and takes them.
type updater struct {
	tool        goTool
	images      images
	govulncheck string
	stdout      io.Writer
}

// say prints one finding.
func (u *updater) say(what, format string, args ...any) {
	_, _ = fmt.Fprintf(u.stdout, "%-33s%s\n", what, fmt.Sprintf(format, args...))
}

// update prints newer versions, and takes them if write is set. They stay if derpd
// builds with them and its tests pass. A failure restores all files.
func (u *updater) update(ctx context.Context, write bool) (_ outputs, err error) {
	files, err := readFiles()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && write {
			err = errors.Join(err, files.restore())
		}
	}()
	before, err := readModule(ctx, u.tool)
	if err != nil {
		return nil, err
	}

	targets, err := u.newer(ctx, before)
	if err != nil {
		return nil, err
	}
	var missing []string
	if write && len(targets) > 0 {
		if missing, err = take(ctx, u.tool, before, targets); err != nil {
			return nil, err
		}
	}
	// After taking newer versions, because one of them may be the fix.
	fixes, err := u.vulnerabilities(ctx)
	if err != nil {
		return nil, err
	}
	if write && len(fixes) > 0 {
		now, err := readModule(ctx, u.tool)
		if err != nil {
			return nil, err
		}
		if missing, err = take(ctx, u.tool, now, fixes.targets()); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		u.say("not fetched", "%s; not compiled", strings.Join(missing, ", "))
	}
	if err := u.base(ctx, files[dockerfile]); err != nil {
		return nil, err
	}

	after, err := readModule(ctx, u.tool)
	if err != nil {
		return nil, err
	}
	if before.goVersion != after.goVersion {
		u.say("go", "%s -> %s", before.goVersion, after.goVersion)
	}
	var out outputs
	if !write || maps.Equal(before.requires, after.requires) && before.goVersion == after.goVersion {
		if write {
			_, _ = fmt.Fprintln(u.stdout, "nothing to take")
		}
		out.set("updated", "false")
		return out, nil
	}

	edited, release, err := files.adopt(before, after, fixes)
	if err != nil {
		return nil, err
	}
	// Tests compare the documents with go.mod.
	written, err := files.write(edited)
	if err != nil {
		return nil, err
	}
	if err := judge(ctx, u.tool); err != nil {
		return nil, err
	}
	u.say("derpd", "builds, and its tests pass")
	_, _ = fmt.Fprintf(u.stdout, "wrote %s\nnext release: %s\n", strings.Join(written, ", "), release)
	out.set("updated", "true")
	out.set("from", before.requires[tailscale])
	out.set("to", after.requires[tailscale])
	out.set("version", release)
	return out, nil
}

// newer returns the releases to take, MODULE@VERSION.
func (u *updater) newer(ctx context.Context, m module) ([]string, error) {
	var targets []string
	for _, path := range []string{tailscale, certmagic} {
		have, ok := m.requires[path]
		if !ok {
			return nil, fmt.Errorf("go.mod does not require %s; this is not derpd's directory", path)
		}
		released, retractions, err := releasesOf(ctx, u.tool, path)
		if err != nil {
			return nil, err
		}
		if retractions != nil {
			u.say(path, "retracted versions are not known: the newest version is not served")
		}
		best := release.Newest(released, path == tailscale)
		if best == "" {
			return nil, fmt.Errorf("%s: no stable release among the %d versions that the module proxy lists", path, len(released))
		}
		switch {
		case !release.IsStable(have):
			// A version that is not a release was chosen on purpose.
			u.say(path, "%s, not a release; the newest one is %s", have, best)
		case semver.Compare(best, have) > 0:
			u.say(path, "%s -> %s", have, best)
			targets = append(targets, path+"@"+best)
		default:
			u.say(path, "%s, the newest", have)
		}
	}
	return targets, nil
}

// base prints whether there is a newer base image. It changes nothing: a newer Debian
// may lack something that derpd needs, so a person must decide.
func (u *updater) base(ctx context.Context, dockerfile string) error {
	image, err := baseImage(dockerfile)
	if err != nil {
		return err
	}
	next, ok := nextBase(image)
	if !ok {
		u.say("base image", "%s; its name has no Debian version, so it is not checked for a newer one", image)
		return nil
	}
	switch _, err := u.images.digest(ctx, next); {
	case errors.Is(err, errNoImage):
		u.say("base image", "%s, the newest", image)
	case err != nil:
		u.say("base image", "%s; not checked for a newer one: %v", image, err)
	default:
		u.say("base image", "%s; %s exists: try it as BASE_IMAGE", image, next)
	}
	return ctx.Err()
}
