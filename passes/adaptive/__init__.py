"""Adaptive computation modules: conversion of feed-forward networks, and the distillation that trains them."""
